"""What private fine-tuning is compared with, on the same mechanism and ledger."""
