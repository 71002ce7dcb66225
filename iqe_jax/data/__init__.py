"""From files to arrays: finding, drawing, decoding and augmenting images. Nothing here sees parameters."""
