"""What training loops of torch ask for beside batches."""
