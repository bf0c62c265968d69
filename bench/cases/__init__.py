"""What is measured, what is compared, and how both are built."""
