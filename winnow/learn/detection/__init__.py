"""Detection in three dimensions from several cameras, at toy scale: what ToC3D is tried on."""
