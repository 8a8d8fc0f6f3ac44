"""What a run did, as one HTML page with pictures; and several runs side by side."""
