"""What runs beside the learner: coordinator, generation, grading, reference, policy store, journal."""
