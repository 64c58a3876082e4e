"""What the server and the decoders of `decoder_child` write to each other."""

import struct

#: What a fork may use: seconds of processor time, seconds of time, and MiB of memory beyond what this process has.
TICKET = struct.Struct("<HHH")
#: Kind, reduction, halvings by the decoder, width and height of what it must return, and the length of the file that follows.
REQUEST = struct.Struct("<cBBIII")
#: Width and height of the pixels that follow, as RGB. 0, 0: the picture cannot be decoded.
ANSWER = struct.Struct("<II")
HEIC, AVIF, JPEG2000 = b"h", b"a", b"j"
#: A fork's first word: it runs, and is confined. What ends it from then on is its picture.
READY = b"r"
#: The same, where the kernel or the machine has no filter of system calls. The limits on memory and time hold.
READY_WITHOUT_FILTER = b"u"
