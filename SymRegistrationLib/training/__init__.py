"""From scans or label maps to weights and a model card."""
