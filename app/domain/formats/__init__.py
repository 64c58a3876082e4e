"""Split picture files into their parts before a decoder reads them: one module per file format.

Each module has one function, `still`. It returns the parts that make the pixels, and the orientation that the side data
state. It leaves out everything else (profiles, comments, previews, videos) without reading or unpacking it.
"""
