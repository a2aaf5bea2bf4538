"""Features as Arrow columns: numbers, columns, and what is fitted to a sample before the first of them."""
