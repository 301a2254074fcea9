"""Pictures as files and as people see them: recipes inside, sheets, series, pages."""
