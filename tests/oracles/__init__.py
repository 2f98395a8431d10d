"""Independent float64 references, written from the papers; they import NumPy alone."""
