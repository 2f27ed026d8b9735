"""The rows a run trains on: where they come from, and what they are turned into."""
