"""The types of the contract. Import them from their modules; this package imports nothing by itself."""
