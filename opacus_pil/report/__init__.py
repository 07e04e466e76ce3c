"""The pages people read: one family, one base template, plain records in and one HTML file out."""

from .exposed import Exposed as Exposed
from .page import Claim as Claim
from .page import Report as Report
from .page import Request as Request
from .page import Table as Table
from .page import render_page as render_page
from .page import write_page as write_page
from .summary import Illustration as Illustration
from .summary import Section as Section
from .summary import render_report as render_report
from .summary import write_report as write_report
from .words import LABELS as LABELS
