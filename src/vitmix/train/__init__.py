"""The training program: data, methods by name, the Lightning task, one run from start to end."""
