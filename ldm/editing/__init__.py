"""Edit images: settings, holes, the editor, many edits at once, relighting, safety."""
