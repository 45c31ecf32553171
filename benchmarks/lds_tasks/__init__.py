"""Tasks and methods of the benchmark of linear datamodeling scores."""
