# The sum of what several test programs have counted, as one line.
/^test result:/ { passed += $4; failed += $6; skipped += $8 }
END { printf "\n%d passed, %d failed, %d skipped\n", passed, failed, skipped }
