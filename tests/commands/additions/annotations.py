"""Annotations in a format of one's own: an .ini file with a section per picture."""

from configparser import ConfigParser

from amclr_scale.data.ingestion import FORMATS, Record, Reject


def ini(source, into):
    parser = ConfigParser()
    parser.read(source.file, "utf-8")
    into.decided = f"{source.file.name}: .ini"
    for row, name in enumerate(parser.sections()):
        caption = parser[name].get("caption")
        into.add([Record(row, name, (caption,)) if caption else Reject(row, "no caption", image=name)])


FORMATS["ini"] = ini
