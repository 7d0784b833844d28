"""Tests of the data readers, the crops, the code files and the OpenMoji data set."""
