"""Files on disks and in object stores through the same calls: reading, publishing, and what errors mean."""
