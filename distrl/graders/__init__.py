"""Graders: what judges a response, alone or several together, with limits that hold whatever the grader does."""
