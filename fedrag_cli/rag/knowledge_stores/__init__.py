"""Knowledge stores."""
