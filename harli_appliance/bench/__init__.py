"""Measuring the appliance from outside, over HTTP, as its clients see it: traces, replay, demo, report."""
