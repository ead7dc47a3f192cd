"""Scans, points and transforms in mm, and their files; nothing here knows a method."""
