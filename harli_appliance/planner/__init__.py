"""What finetuning a device would leave room for, simulated: costs, a clock, and the appliance's own
scheduler."""
