"""Names, moments and boxes of things in clips, written as words: what OmniVid's connector learns first."""
