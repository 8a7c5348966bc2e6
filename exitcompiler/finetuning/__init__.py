"""Fine-tuning: a captured network and its exits, trained together as one program."""
