"What two tickets have in common, and what one costs to store."
