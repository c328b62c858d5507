"""From features to numbers: extraction, probes, metrics, reports."""
