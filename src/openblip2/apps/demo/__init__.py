"""The command `openblip2 demo`: all steps from pictures to a report."""

from openblip2.apps.demo.plan import DemoPlan, plan_for
from openblip2.apps.demo.run import run_demo

__all__ = ["DemoPlan", "plan_for", "run_demo"]
