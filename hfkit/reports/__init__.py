"""What is written for people: cards, tables, summaries."""
