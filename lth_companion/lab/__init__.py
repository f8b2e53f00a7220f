"Trials, their store and sweeps, notebooks, claims and the report."
