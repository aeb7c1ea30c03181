"""A run, or several side by side, as one HTML page that needs no network: `crisp report RUN [RUN…]`.

`gather` reads a run's folder, `sections` say what is shown of it as blocks, `page` writes blocks as HTML, and
`assets` hold the template, the style and the script.
"""
