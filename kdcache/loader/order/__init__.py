"""In which order sequences are read: pure functions of seed, epoch and sizes."""
