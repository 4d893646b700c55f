"""Tables, figures and the HTML page of an evaluation. May import `retroexit.evaluation` and what lies below."""
