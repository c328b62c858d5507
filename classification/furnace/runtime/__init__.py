"""The ground floor: files, run directories, processes, precision. Knows nothing of models or data."""
