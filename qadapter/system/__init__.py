"""What the machine gives: room in memory and on disk, locks, text files, progress that is shown."""
