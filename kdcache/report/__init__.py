"""What people look at: tables, sparklines and plots of an evaluation."""
