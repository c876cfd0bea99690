"""The page behind ``/ui``: its files, and how they are sent. What it shows it asks of the admin API, as anybody may.

``static/`` has the page as the browser gets it: modules without a build step, and three small libraries in
``static/vendor`` (``packaging/dev/vendor-ui`` fetches them): Preact draws, htm writes its elements as templates, uPlot
draws curves. They were chosen for their size (together 30 KB compressed) and because none of them needs ``eval`` or a
style attribute, so that the strictest content policy holds.
"""
