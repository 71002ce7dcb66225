"""The method as pure functions of parameters and arrays; models never see files, devices or configs of runs."""
