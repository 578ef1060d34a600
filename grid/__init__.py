"""The experiment grid: studies, plans, launching, assessing and reporting."""
