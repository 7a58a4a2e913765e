"""Critical windows: when a unit forms, from the values of its metric alone.

Pure: numbers in, events out. :class:`WindowDetector` follows many curves at once;
:class:`MechanismWindow` decides which unit's window is the mechanism's; :func:`window_report` puts
it into words and JSON. The callback :class:`~mda_lightning.callbacks.CriticalWindow` and the
command ``mda-lightning window`` are both made of these.
"""

from mda_lightning.window.detector import WindowDetector, replay
from mda_lightning.window.followed import Followed
from mda_lightning.window.mechanism import Edge, MechanismWindow, Phase
from mda_lightning.window.report import WINDOW_NAME, message_of, window_report
from mda_lightning.window.rule import State, Window, WindowEvent, WindowRule

__all__ = [
    "WINDOW_NAME",
    "Edge",
    "Followed",
    "MechanismWindow",
    "Phase",
    "State",
    "Window",
    "WindowDetector",
    "WindowEvent",
    "WindowRule",
    "message_of",
    "replay",
    "window_report",
]
