"""What the shop is and has to show: zone and currency, items, offers, stores."""
