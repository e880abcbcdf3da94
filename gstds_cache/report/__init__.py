"""What people look at: scores of every sample as a table, and a page of a selection and its runs."""
