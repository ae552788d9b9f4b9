"""What any training needs and no reader asks for: command line, checkpoints, processes, optimizers, video files."""
