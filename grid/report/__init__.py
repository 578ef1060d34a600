"""From scores to tables and a page."""
