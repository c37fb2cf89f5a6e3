"""Records to tables, figures, claims and the report page; never imports torch."""
