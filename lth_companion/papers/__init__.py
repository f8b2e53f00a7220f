"Each paper's trials, settings and tiers; a paper's module imports no other's."
