"""What is done for a customer over time: journeys, their timers, and the outbox through which what was decided leaves."""
