"""From boxes to training samples."""
