"""Picture files taken apart before a decoder reads them: one module per file format.

Each module has one function, `still`. It returns the parts that make the pixels, and the orientation that the side data
state. Profiles, comments, previews, videos and everything else are left out, unread and unpacked.
"""
