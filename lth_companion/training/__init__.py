"Data, networks, the training loop, cohorts of tickets, and what training costs."
