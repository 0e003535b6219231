"""Whisper turns speech into text: an encoder hears 30 seconds of sound, and a decoder writes tokens for it.

    files.py        a checkpoint of `transformers` or CTranslate2  ->  WhisperFiles
    network.py      mel features  ->  encoder  ->  what the decoder sees; tokens  ->  logits
    rules.py        logits  ->  the tokens that may come next
    transcription.py  a sound of any length  ->  windows  ->  Transcript

Elsewhere: log-mel features are `media/sounds.py`, files of sound `media/decoder.py`; the result is
`media/transcript.py`. A model that takes sound itself has an audio tower in `model/encoders/`.
"""
